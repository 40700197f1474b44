"""Tasks that belong together, a file each: functions `(data, meter)` that give items, and the table `TASKS` of them.

`data` is the folder with the data files, searched to any depth; a first line of a docstring describes the task.
"""
