"""The last module that the server of forks imports: every fork knows the tiny tasks, and has the CPU operators' library."""

from surgeon.layers.ops.native import compiler
from tests.support.search.tasks import add_tasks

add_tasks()
compiler.why_no_library()
