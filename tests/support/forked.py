"""The last module that the server of forks imports: every fork knows the tiny tasks."""

from tests.support.search.tasks import add_tasks

add_tasks()
