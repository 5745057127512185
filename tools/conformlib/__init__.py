"""Other people's tests of NBD, run on ours. Nothing of theirs is in this repository: it is fetched into a cache.

`cache` fetches and unpacks Debian's source packages with an apt configuration of its own. A suite is a function from a
`Place` (cache, work directory) to rows: `iotests` (QEMU's, on ``incbak serve`` behind ``qemu-nbd-shim``), `injector`
(QEMU's server that hangs up, against our client), `tester` (the reference implementation's client), `libnbd` (its
interop programs). A row is passed, failed with the reason, or not applicable with the reason; a suite that cannot be
had at all raises `Unavailable`.
"""
