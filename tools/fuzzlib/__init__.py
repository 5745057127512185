"""A seeded fuzzer for everything that reads what somebody else wrote.

`mutate` changes bytes and invents values; `case` has what every target shares: what a finding is, the limits of time
and memory, and the watch over logs and threads. A *target* makes an input from a random generator alone, and runs it:
`nbd`, `bitmap`, `repo` (with `forge`, which writes repositories that are well-formed but absurd), `monitor`, `text`.

An input is mutated in two ways. Bytes are flipped, cut, doubled and spliced: most of that dies at a checksum, as it
should. And structures are made with extreme values and *then* sealed with the right checksum, so that the code behind
the checksum is reached: what a hostile writer would do. Every case depends on seed, target and number only.
"""
