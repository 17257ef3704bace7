"""The run directory, and the state from which a run resumes.

- :mod:`.layout`: which file holds what in a run; :mod:`.lock`: one run per directory
- :mod:`.state`, :mod:`.rng`: the tensors and generators that make up the state of a run
- :mod:`.save`: write one checkpoint; :mod:`.commit`: the order in which it becomes visible; :mod:`.filesystem`: the
  system calls; :mod:`.ranks`: what several processes tell each other meanwhile
- :mod:`.manifest`, :mod:`.tensorfile`: the formats; :mod:`.integrity`: what is damaged
- :mod:`.load`: the newest good state; :mod:`.stored`: any slice of it; :mod:`.legacy`: pico-train's checkpoint.pt
- :mod:`.retention`: when to save, what to delete; :mod:`.verify`: the command that checks a run
"""
