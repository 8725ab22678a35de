"""`surgeon push`: a folder onto the Hugging Face Hub."""

import argparse

from surgeon.commands import checks
from surgeon.commands.arguments import print_json

DESCRIPTION = "publish a folder that surgeon wrote on the Hugging Face Hub"
EXAMPLES = """  surgeon push runs/resnet50-acda me/resnet50-acda --private

The token is that of `hf auth login`, or HF_TOKEN. The folder is checked first; what goes up are
its recipe, weights, reports and model card (README.md), not what training left in it. Others take
the result as hf-hub:me/resnet50-acda wherever a folder is named.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `surgeon push`, beside --json, --quiet and --debug."""
    parser.add_argument("run", metavar="RUN", help="a folder that surgeon wrote")
    parser.add_argument("repo_id", metavar="ORG/NAME", help="the repository; it is made if it is not there")
    parser.add_argument("--private", action="store_true", help="make the repository private if it is new")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to commit to (default: main)")
    parser.add_argument("--message", metavar="TEXT", help="of the commit")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request in place of committing")


def check(args: argparse.Namespace) -> None:
    """What can be refused at once."""
    checks.run_folder(args.run)


def run(args: argparse.Namespace) -> int:
    """Returns the exit code."""
    from surgeon.commands.console import Progress
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
