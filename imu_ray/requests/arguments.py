"""The arguments of ``imu-ray request``; imports nothing that takes time."""

import argparse


def add_actions(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``imu-ray request``."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, text: str) -> argparse.ArgumentParser:
        made = actions.add_parser(name, help=text, description=text)
        made.add_argument("queue", metavar="QUEUE", help="directory or URI of the queue")
        return made

    add = action("add", "take a request into the queue, which is made where there is none")
    given = add.add_mutually_exclusive_group(required=True)
    given.add_argument("--json", metavar="PATH", help="an erasure request in OpenDSR's JSON")
    given.add_argument("--ids", metavar="PATH", help="a list of ids: .parquet, .csv, or one a line")
    text = "type of the identities whose values are ids of samples; default controller_customer_id"
    add.add_argument("--identity-type", metavar="TYPE", help=text)
    run = action("run", "show what waits and what it takes, then carry it out; the same command goes on when killed")
    run.add_argument("--config", required=True, help="job file (YAML); its forget_set.path is the full data")
    run.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting")
    run.add_argument("--dry-run", action="store_true", help="only show")
    run.add_argument("--retry", action="store_true", help="take up what is not_reached or failed, too")
    text = "apply all requests of the lineage again, to the model of the job file, as after fine-tuning"
    run.add_argument("--replay", action="store_true", help=text)
    action("status", "say where every request stands, and which model is the current one")
    cancel = action("cancel", "take a request back that is pending, not_reached or failed")
    cancel.add_argument("request", metavar="ID", help="subject_request_id")
    cancel.add_argument("--reason", default="cancelled", help="what its answer says")
    action("abandon", "give up a batch that was begun; its requests wait again")
    action("verify", "say whether lineage, models and answers are still what was written; exit status 1 where not")
