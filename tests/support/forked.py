"""What the server of forks imports before it forks, and no one else."""

import tests.support.search.toys
import tests.support.training.driver  # noqa: F401
from tests.support.search.tasks import add_tasks

add_tasks()
