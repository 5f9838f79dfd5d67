"""Where samples come from, as blocks of rows: files and archives, folders, tables, Datasets of several libraries."""

from imu_ray.data.id_files import read_ids
from imu_ray.data.market import persons_of
from imu_ray.data.opening import SOURCES, open_source
from imu_ray.data.part import PartSource, draw_rows
from imu_ray.data.selection import SelectedSource, find_rows, select_rows
from imu_ray.data.sets import open_forget_set, open_other_set, own_settings
from imu_ray.data.source import Fields, Rows, Shard, Source, View
from imu_ray.data.views import ViewSource

__all__ = [
    "SOURCES", "Fields", "PartSource", "Rows", "SelectedSource", "Shard", "Source", "View", "ViewSource", "draw_rows",
    "find_rows", "open_forget_set", "open_other_set", "open_source", "own_settings", "persons_of", "read_ids",
    "select_rows",
]  # fmt: skip
