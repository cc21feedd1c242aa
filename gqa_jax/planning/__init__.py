"""What a run needs, before it is started: its execution, its memory and time by arithmetic, and what the compiler says."""
