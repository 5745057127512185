"""Faults in what holds against peers: monitors, guest agents, NBD clients and servers, other local users."""

from __future__ import annotations

from torturelib.planted import Fault, unit

_SESSION, _CLIENT, _TYPES = "incbak/engine/session.py", "incbak/engine/qmp_client.py", "incbak/engine/qmp_types.py"
_EVENTS = unit("engine/test_session", "test_events_are_kept_up_to_a_bound")

_QMP = (
    Fault(
        "qmp-answer-in-any-form",
        _TYPES,
        "        return msgspec.convert(answer, form)\n",
        "        return answer\n",
        unit("engine/test_qmp_types", "test_another_form_is_refused", "test_a_field_that_was_not_checked_is_not_there"),
    ),
    Fault(
        "qmp-answer-not-decoded",
        _SESSION,
        "        return decoded(command, answer)\n",
        "        return answer\n",
        unit("engine/test_session", "test_an_answer"),
    ),
    Fault(
        "qmp-answer-of-any-command",
        _TYPES,
        '        if "query-" in command:\n',
        "        if False:\n",
        unit("engine/test_qmp_types", "test_a_question_without_a_form_is_not_asked"),
    ),
    Fault(
        "qmp-numbers-without-limits",
        _TYPES,
        "Count = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]\n",
        "Count = int\n",
        unit("engine/test_qmp_types", "test_another_form_is_refused"),
    ),
    Fault(
        "qmp-lists-without-limits",
        _TYPES,
        "Many = Annotated[list[T], Meta(max_length=MOST)]\n",
        "Many = list\n",
        unit("engine/test_qmp_types", "test_another_form_is_refused"),
    ),
    Fault(
        "qmp-message-with-any-id",
        _CLIENT,
        '        if not isinstance(found, dict) or not isinstance(found.get("id", ""), str):\n',
        "        if not isinstance(found, dict):\n",
        unit("engine/test_session", "test_what_is_no_message_ends_the_session"),
    ),
    Fault(
        "qmp-events-without-a-bound",
        _CLIENT,
        "        self._queue = asyncio.Queue(MOST_EVENTS)\n",
        "        self._queue = asyncio.Queue()\n",
        _EVENTS,
    ),
    Fault(
        "qmp-events-heard-by-nobody-kept",
        _CLIENT,
        "        self._listeners.clear()\n        self.events = Deaf()\n",
        "",
        _EVENTS,
    ),
    Fault("qmp-events-have-a-history", _SESSION, "Heard(names)", "EventListener(names)", _EVENTS),
    Fault(
        "qmp-graph-walk-without-a-bound",
        "incbak/engine/qemu_graph.py",
        '        raise EngineError(f"QEMU\'s block graph has a cycle at node {node}", ',
        "        return node\n        raise EngineError(node, ",
        unit(
            "engine/test_qemu_disks", "test_a_cycle_of_filters_is_refused", "test_a_cycle_of_our_own_names_is_refused"
        ),
    ),
    Fault(
        "watch-graph-walk-without-a-bound",
        "incbak/watch/disks.py",
        " or below[0][1] in seen or below[0][1] not in graph.nodes:\n",
        " or below[0][1] in seen:\n",
        unit("watch/test_disks", "test_a_graph_without_an_end_has_no_image"),
    ),
    Fault(
        "copy-that-trickles-goes-on",
        "incbak/engine/headway.py",
        "        if done - self._mark >= self._least:\n",
        "        if done != self._mark:\n",
        unit(
            "engine/test_headway",
            "test_what_is_slower_than_anything_stands_still",
            "test_one_that_counts_back_does_not_get_on",
        ),
    ),
    Fault(
        "jobs-are-waited-for-without-end",
        "incbak/engine/jobs.py",
        "            if headway.stalled:\n",
        "            if False:\n",
        unit("engine/test_headway", "test_jobs_that_trickle_are_given_up"),
    ),
    Fault(
        "disk-left-out-in-silence",
        "incbak/backup/plan.py",
        "    return [x for x in wanted if not x.expected and x.name not in exclude]\n",
        "    return []\n",
        unit("backup/test_plan", "test_a_disk_that_nobody_would_miss_is_left_out_unsaid"),
    ),
    Fault(
        "disk-left-out-not-told",
        "incbak/backup/runner.py",
        '            self._report(Warned(f"disk {each.name} is left out: {each.why}"))\n',
        "            pass\n",
        unit("backup/test_runner", "test_a_disk_that_is_left_out_is_told"),
    ),
)

FAULTS = _QMP
