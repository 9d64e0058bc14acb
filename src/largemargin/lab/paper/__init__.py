"""The paper: the cells of its tables as runs, and the report that puts its numbers beside ours."""
