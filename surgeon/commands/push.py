"""`surgeon push`: push a folder to the Hugging Face Hub."""

import argparse

from surgeon.commands.common import checks
from surgeon.commands.common.arguments import print_json

DESCRIPTION = "push a folder written by surgeon to the Hugging Face Hub"
EXAMPLES = """  surgeon push runs/resnet50-acda me/resnet50-acda --private

The token is that of `hf auth login`, or HF_TOKEN. The folder is verified first; its recipe,
weights, reports and model card (README.md) are pushed, but no training files. Others can use
the result as hf-hub:me/resnet50-acda wherever a folder is accepted.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `surgeon push`; --json, --quiet and --debug are common to all commands."""
    parser.add_argument("run", metavar="RUN", help="a folder written by surgeon")
    parser.add_argument("repo_id", metavar="ORG/NAME", help="the repository; created if it does not exist")
    parser.add_argument("--private", action="store_true", help="make the repository private if it is new")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to commit to (default: main)")
    parser.add_argument("--message", metavar="TEXT", help="commit message")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")


def check(args: argparse.Namespace) -> None:
    """Refuse invalid arguments before torch is loaded."""
    checks.run_folder(args.run)
    checks.repository(args.repo_id)


def run(args: argparse.Namespace) -> int:
    """Returns the exit code."""
    from surgeon.commands.common.console import Progress
    from surgeon.models.hub import push_to_hub

    with Progress(enabled=not args.quiet) as progress:
        progress("push", 0, 1)
        address = push_to_hub(
            args.run,
            args.repo_id,
            commit_message=args.message,
            revision=args.revision,
            private=args.private or None,
            create_pr=args.create_pr,
        )
        progress("push", 1, 1)
    if args.json:
        print_json({"run": args.run, "repo_id": args.repo_id, "url": address})
    else:
        print(f"pushed to   {address}\nload with   surgeon.from_pretrained({args.repo_id!r})")
    return 0
