"""A backup run: from the lock on the VM to the last bitmap that goes. `runner` has the order that makes it safe.

::

    engine --NBD writes--> target --> sink --> pipeline (threads) --> the repository's writer
                                       |           hash, look up, compress, verify
                                       partial, tree pages of the base

`plan` decides, purely, what is read and why. A sink takes writes in any order and alignment and knows which bytes came;
what it holds of half clusters is bounded, and so is what the pipeline has in flight. The engine feels a slow repository
as a slow target, and the guest does not feel it at all.

A disk counts only when three things agree: the job says it is done, the sink was flushed, and as many bytes came as the
job says it copied. If one is missing the disk is left out of the record and its base's bitmap stays.
"""
