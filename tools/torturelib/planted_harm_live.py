"""Planted faults: what keeps a running QEMU, its guest and other programs in it from harm."""

from __future__ import annotations

from torturelib.planted import Fault, unit

_GRAPH = "incbak/engine/qemu_graph.py"
_STATE = "incbak/engine/run_state.py"
_LIVE = "tests/live/test_qemu_migration.py::"

FAULTS = [
    Fault(
        "live: a device is moved to the node on which it stands",
        _GRAPH,
        "if (await read_graph(session, timeout=timeout)).root(backend) != node:",
        "if backend:",
        unit("engine/test_qemu_graph", "test_a_device_is_never_moved_to_where_it_stands"),
    ),
    Fault(
        "live: an overlay keeps our filter as its backing node",
        _GRAPH,
        'elif user.kind == "block-driver" and user.edge == "backing":',
        "elif not user:",
        unit("engine/test_qemu_graph", "test_an_overlay_of_the_filter_gets_what_is_below_it_as_its_backing_node"),
    ),
    Fault(
        "live: implicit filters are bypassed",
        "incbak/engine/qemu_disks.py",
        'root = graph.root(backend_name(device)) or str(inserted.get("node-name", ""))',
        'root = str(inserted.get("node-name", ""))',
        unit("engine/test_qemu_graph", "test_an_implicit_filter_stays_between_the_device_and_its_image"),
    ),
    Fault(
        "live: a shareable disk is backed up",
        "incbak/engine/qemu_shared.py",
        "    if unguarded:\n",
        "    if not root:\n",
        unit("engine/test_qemu_graph", "test_a_disk_that_may_be_shared_is_left_out_with_the_reason"),
    ),
    Fault(
        "live: a disk outside of the block layer is left out in silence",
        "incbak/engine/qemu.py",
        "        left_out += await find_outside(self._session)\n",
        "",
        ("tests/live/test_qemu_neighbours.py::test_a_disk_outside_of_the_block_layer_is_said_to_be_left_out",),
    ),
    Fault(
        "live: devices without an id are not looked at",
        "incbak/engine/qemu_outside.py",
        '_PLACES = ("/machine/peripheral", "/machine/peripheral-anon")',
        '_PLACES = ("/machine/peripheral",)',
        ("tests/live/test_qemu_neighbours.py::test_a_disk_outside_of_the_block_layer_is_said_to_be_left_out",),
    ),
    Fault(
        "live: a disk that is passed through is backed up",
        "incbak/engine/qemu_graph.py",
        "        if kind in _PASSED_THROUGH:\n",
        "        if not kind:\n",
        unit("engine/test_qemu_graph", "test_devices_that_are_written_past_the_block_layer_are_known"),
    ),
    Fault(
        "live: a disk whose guest may pass commands through is backed up",
        "incbak/engine/qemu_graph.py",
        '        elif await _property(session, path, "scsi") is True:\n',
        "        elif not kind:\n",
        unit("engine/test_qemu_graph", "test_devices_that_are_written_past_the_block_layer_are_known"),
    ),
    Fault(
        "live: a second writer of a node is not seen",
        "incbak/engine/qemu_shared.py",
        "if len(writers) <= 1:",
        "if writers:",
        unit("engine/test_qemu_graph", "test_a_second_writer_anywhere_below_the_device_is_found"),
    ),
    Fault(
        "live: a second writer below the image is not seen",
        "incbak/engine/qemu_shared.py",
        "            if child and child not in own:\n",
        "            if not own:\n",
        unit("engine/test_qemu_graph", "test_a_second_writer_anywhere_below_the_device_is_found"),
    ),
    Fault(
        "live: a VM that has moved away is backed up",
        _STATE,
        "    if why := _REFUSED.get(state) if state else None:\n",
        "    if why := _REFUSED.get(state) if not state else None:\n",
        unit("engine/test_run_state", "test_each_state_is_decided"),
    ),
    Fault(
        "live: a migration does not count",
        _STATE,
        "    if migration not in _NO_MIGRATION:\n",
        "    if not status:\n",
        unit("engine/test_run_state", "test_a_migration_wins_over_the_state"),
    ),
    Fault(
        "live: cont is given to a VM that has left",
        "incbak/engine/qemu_window.py",
        "    if status == RunState.PAUSED:\n",
        "    if status:\n",
        unit("engine/test_run_state", "test_only_a_stop_of_our_own_is_resumed"),
    ),
    Fault(
        "live: the guard gives cont to a VM that has left",
        "incbak/engine/guard.py",
        """            if status and b'"paused"' not in status:\n""",
        "            if False:\n",
        unit("engine/test_run_state", "test_the_guard_of_a_dead_runner_resumes_only_its_stop"),
    ),
    Fault(
        "live: a migration can be completed beside our filters",
        "incbak/engine/qemu.py",
        "                await blocker.add()\n",
        "",
        (f"{_LIVE}test_a_migration_that_is_quick_fails_or_the_backup_does",),
    ),
    Fault(
        "live: a migration is not seen while the jobs copy",
        "incbak/engine/qemu.py",
        "                        until_refused(self._session),\n",
        "                        asyncio.sleep(3600),\n",
        (f"{_LIVE}test_a_migration_wins_and_the_vm_is_backed_up_only_where_it_runs",),
    ),
    Fault(
        "live: the state is not looked at before the commit",
        "incbak/backup/runner.py",
        "            await self._engine.confirm()\n",
        "",
        unit("backup/test_runner", "test_the_engine_looks_again_before_the_commit"),
    ),
    Fault(
        "live: a target can be dialled again while its runner lives",
        "incbak/engine/guard.py",
        "            with listener:\n",
        "            for self._kept in [listener]:\n",
        unit("engine/test_door", "test_one_connection_is_let_in_and_no_second_one"),
    ),
    Fault(
        "live: the socket of a target has a name that the next one has too",
        "incbak/engine/qemu_door.py",
        "self.name = secrets.token_hex(8)",
        'self.name = "sink.sock" + secrets.token_hex(0)',
        unit("engine/test_door", "test_the_way_leads_nowhere_when_the_number_is_another_directorys"),
    ),
    Fault(
        "live: a peer that waits for room does not notice the cut",
        "incbak/engine/guard.py",
        "            if not sock.recv(1 << 16, socket.MSG_DONTWAIT):\n",
        "            if sock:\n",
        unit("engine/test_door", "test_a_peer_that_waits_for_room_notices_the_cut"),
    ),
    Fault(
        "live: the guard does not cut what it let in",
        "incbak/engine/guard.py",
        "            self._sinks.append(connection)\n",
        "            self._kept = connection\n",
        unit("engine/test_door", "test_an_owner_that_is_silent_or_gone_makes_nobody_wait"),
    ),
    Fault(
        "live: a listener outlives its owner",
        "incbak/engine/guard.py",
        "        for _, listener in self._listeners.values():\n            listener.close()\n",
        "        self._kept = dict(self._listeners)\n",
        unit("engine/test_door", "test_a_listener_that_nobody_came_to_is_closed_too"),
    ),
    Fault(
        "live: what QEMU keeps of the nodes against a migration is not told",
        "incbak/engine/qemu_migration.py",
        '                left.append(f"node {node}: {e}")\n',
        "                assert e\n",
        unit("engine/test_qemu_migration", "test_what_qemu_keeps_is_said"),
    ),
    Fault(
        "live: the guard goes before qemu has resumed the vm",
        "incbak/engine/guard.py",
        "        while time.monotonic() < deadline:\n            self._monitor.settimeout",
        "        for _ in range(1):\n            self._monitor.settimeout",
        unit("engine/test_run_state", "test_the_guard_stays_until_qemu_says_that_the_vm_runs"),
    ),
    Fault(
        "live: a cont of the guard is taken for carried out",
        "incbak/engine/guard.py",
        "        if self._resume_at != _NEVER or (orphan and self._resumed):\n",
        "        if self._resume_at != _NEVER:\n",
        unit("engine/test_run_state", "test_the_guard_stays_until_qemu_says_that_the_vm_runs"),
    ),
    Fault(
        "live: the guard asks qemu before it cuts the targets",
        "incbak/engine/guard.py",
        """        if orphan:
            self._cut()  # first: what QEMU is busy with may wait for a target
        if self._thaw_at != _NEVER:
            self._thaw()
        if self._resume_at != _NEVER or (orphan and self._resumed):
            self._resume(orphan)
""",
        """        if self._thaw_at != _NEVER:
            self._thaw()
        if self._resume_at != _NEVER or (orphan and self._resumed):
            self._resume(orphan)
        if orphan:
            self._cut()
""",
        unit("engine/test_run_state", "test_the_guard_cuts_targets_before_it_asks_qemu"),
    ),
    Fault(
        "live: a runner that gives up ends the guard",
        "incbak/engine/qemu_guard.py",
        "        self._stopped = True\n",
        "",
        unit("engine/test_run_state", "test_a_runner_that_gives_up_leaves_the_vm_to_the_guard"),
    ),
]
