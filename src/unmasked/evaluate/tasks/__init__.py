"""What an encoder is scored on: a user's own files, the words of a CoNLL file, a public task.

`task_files` reads a task from a file or folder and `kinds` scores it from vectors (`task_vectors`);
`probe` reads and scores words; `public` has mteb score its own tasks, behind the published
instructions. Each gives a `bootstrap.TaskResult`. Cost: the texts of a task are encoded once.

For others: `task_files.load_task`, `kinds.alike`, `probe.load_probe`, `public.find_tasks`.
"""
