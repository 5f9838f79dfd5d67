"""What a job file means for a queue."""

import pyarrow.parquet as pq
import pytest
from samples import image_table

from imu_ray import ConfigError, ForgetSetError, JobConfig, RequestError, UnlearnConfig
from imu_ray.models.checkpoint import model_hash
from imu_ray.requests.work import JobWork


@pytest.fixture
def job(tmp_path):
    """Reads a job file with assignments."""
    pq.write_table(image_table(20), tmp_path / "data.parquet")
    text = "{{model: {{factory: 'architectures:named', kwargs: {{name: fc}}}}, forget_set: {{path: {}}}}}"
    (tmp_path / "job.yaml").write_text(text.format(tmp_path / "data.parquet"))
    return lambda *sets: JobConfig.load(tmp_path / "job.yaml", sets)


def test_requests_name_rows_so_that_there_is_nothing_to_ask(job):
    assert JobWork(job()).config == UnlearnConfig.from_recipe("samples")
    assert JobWork(job("recipe=classes")).config == UnlearnConfig.from_recipe("classes")
    for setting in ("size=3", "ids=/ids.txt", "where=label == 3"):
        name = setting.partition("=")[0]
        with pytest.raises(ConfigError, match=f"forget_set.{name} is set; expected null, because the requests say"):
            JobWork(job(f"forget_set.{setting}"))
    with pytest.raises(ConfigError, match="did you mean"):
        JobWork(job("ascent.objective=ascend"))


def test_a_batch_goes_on_with_other_resources_and_not_with_other_settings_or_data(job):
    same = JobWork(job()).identity
    assert JobWork(job("resources.workers=3", "run_dir=elsewhere", "forget_set.missing_ids=ignore")).identity == same
    for change in ("seed=1", "forget_set.path=/data", "evaluation.test=/test", "task=reid"):
        assert JobWork(job(change)).identity != same


def test_the_data_is_looked_up_and_the_model_is_hashed(job, tmp_path):
    work = JobWork(job())
    assert sorted(work.find(["s003", "s019", "nowhere"])) == ["s003", "s019"]
    assert work.model_hash(None) == model_hash(job().model.spec().build())
    with pytest.raises(ForgetSetError, match="the full data /nowhere does not exist"):
        JobWork(job("forget_set.path=/nowhere")).find(["s003"])


def test_rows_that_are_told_by_their_number_alone_are_refused(job, tmp_path):
    pq.write_table(image_table(20).rename_columns(["name", "image", "label"]), tmp_path / "data.parquet")
    with pytest.raises(RequestError, match="has no id column, and the number of a row is another's once"):
        JobWork(job()).find(["3"])
    assert sorted(JobWork(job("forget_set.id_column=name")).find(["s003", "3"])) == ["s003"]
