"""An instance of several ranks: one process each, driven by rank 0 over inherited sockets.

Rank 0 is the process that hosts the instance. It starts one helper, the nursery, which imports what a rank needs once
and forks the other ranks; so each costs little time and shares its memory for code with the others. Nothing here knows
of Ray: the same processes run under an actor, a test or a shell.
"""
