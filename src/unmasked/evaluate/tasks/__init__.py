"""What is an encoder scored on? A user's own files, the words of a CoNLL file, or a public task.

`task_files` reads a task from a file or folder, and `kinds` scores it from vectors
(`task_vectors`); `probe` reads and scores words; `public` runs mteb's own tasks with the published
instructions. Each gives a `bootstrap.TaskResult`. Cost: the texts of a task are encoded once.

Others may use `task_files.load_task`, `kinds.alike`, `probe.load_probe` and `public.find_tasks`.
"""
