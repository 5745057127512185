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

_OPENING = "incbak/opening.py"


def _opening(*tests: str) -> tuple[str, ...]:
    return unit("test_opening", *tests)


_PATHS = (
    Fault(
        "named-path-opened-to-look-at-it",
        _OPENING,
        "    found = os.open(path, os.O_PATH | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))\n",
        "    found = os.open(path, os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))\n",
        _opening("test_a_name_of_something_else_is_not_opened"),
    ),
    Fault(
        "named-path-of-any-kind",
        _OPENING,
        "        if not known and not (pipes and stat.S_ISFIFO(mode) and _nameless(info)):\n",
        "        if False:\n",
        _opening("test_what_is_no_file", "test_a_name_of_something_else_is_not_opened"),
    ),
    Fault(
        "named-path-synced-whatever-it-is",
        "incbak/engine/qemu_storing.py",
        "            fd = open_image(path, os.O_RDONLY)  # QEMU names it\n",
        "            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)\n",
        _opening("test_a_name_of_something_else_is_not_opened"),
    ),
    Fault(
        "named-path-of-a-bitmap-opened",
        "incbak/bitmap/judge.py",
        "        fd = open_regular(path, os.O_RDONLY)  # an engine may have named it\n",
        "        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)\n",
        _opening("test_a_name_of_something_else_is_not_opened"),
    ),
)

_AGENT = "incbak/engine/agent.py"

_AGENTS = (
    Fault(
        "agent-answer-of-another-client-not-skipped",
        _AGENT,
        "                with suppress(msgspec.MsgspecError, RecursionError):  # the rest",
        "                with suppress():  # the rest",
        unit("engine/test_agent", "test_what_is_not_ours_is_skipped"),
    ),
    Fault(
        "agent-synchronized-by-any-number",
        _AGENT,
        "                    if _decoded(await self._line()).result == number:\n",
        "                    if _decoded(await self._line()).result is not UNSET:\n",
        unit("engine/test_agent", "test_what_is_not_ours_is_skipped"),
    ),
    Fault(
        "agent-answer-in-any-form",
        _AGENT,
        "            except (msgspec.MsgspecError, RecursionError) as e:\n",
        "            except RecursionError as e:\n",
        unit("engine/test_agent", "test_one_that_lies_has_not_frozen"),
    ),
    Fault(
        "agent-skipped-without-a-bound",
        _AGENT,
        "        except ValueError as e:  # of readline: the line is too long\n",
        "        except ZeroDivisionError as e:\n",
        unit("engine/test_agent", "test_any_answer_is_a_reason"),
    ),
)

_SLOTS, _CONNECTION, _NBD_CLIENT = (f"incbak/nbd/{name}.py" for name in ("slots", "connection", "client"))


def _patience(*tests: str) -> tuple[str, ...]:
    return unit("nbd/test_patience", *tests)


_NBD = (
    Fault(
        "nbd-network-takes-local-slots",
        _SLOTS,
        "            alike = [s for s in self._taken.values() if s.tcp == slot.tcp]\n",
        "            alike = list(self._taken.values())\n",
        _patience("test_a_crowd_on_the_network_takes_no_slot_of_a_local_client"),
    ),
    Fault(
        "nbd-strangers-keep-their-slots",
        _SLOTS,
        "    if negotiating := [s for s in slots if s.tcp and s.heard == math.inf]:\n",
        "    if negotiating := []:\n",
        _patience("test_strangers_that_say_nothing_give_way_to_who_comes"),
    ),
    Fault(
        "nbd-silent-client-keeps-its-slot",
        _SLOTS,
        "        return max(now - self.heard, 0.0) if self.half or self.reader else 0.0\n",
        "        return 0.0\n",
        _patience("test_one_that_stops_within_a_payload_gives_way"),
    ),
    Fault(
        "nbd-idle-writer-gives-way",
        _SLOTS,
        "        return max(now - self.heard, 0.0) if self.half or self.reader else 0.0\n",
        "        return max(now - self.heard, 0.0)\n",
        _patience("test_a_silent_reader_gives_way_and_a_writer_does_not"),
    ),
    Fault(
        "nbd-reader-gives-way-at-once",
        _SLOTS,
        "    return longest if longest and longest.silent(now) >= PATIENCE else None\n",
        "    return longest\n",
        _patience("test_a_reader_that_was_heard_just_now_keeps_its_slot"),
    ),
    Fault(
        "nbd-half-sent-payloads-without-a-bound",
        _CONNECTION,
        "        self._relieve() if length > BUFFER else None\n",
        "",
        _patience("test_half_sent_payloads_have_a_bound_together"),
    ),
    Fault(
        "nbd-payload-of-a-refused-write-kept",
        _CONNECTION,
        "            return self._refuse(command, flags, offset, length) != 0\n",
        "            return False\n",
        _patience("test_what_is_refused_takes_no_memory"),
    ),
    Fault(
        "nbd-payload-of-another-request-kept",
        _CONNECTION,
        "        return length > _LONGEST_STATUS\n",
        "        return False\n",
        _patience("test_a_long_payload_of_another_request_takes_no_memory"),
    ),
    Fault(
        "nbd-payload-without-a-deadline",
        _CONNECTION,
        "        bound_waits(sock, PAYLOAD_TIMEOUT, socket.SO_RCVTIMEO)\n",
        "        bound_waits(sock, 60, socket.SO_RCVTIMEO)\n",
        _patience("test_within_a_payload_a_client_has_a_deadline"),
    ),
    Fault(
        "nbd-idle-client-has-a-deadline",
        _CONNECTION,
        "                except BlockingIOError:\n                    continue  # between",
        "                except ZeroDivisionError:\n                    continue  # between",
        _patience("test_within_a_payload_a_client_has_a_deadline"),
    ),
    Fault(
        "nbd-answer-waited-for-without-end",
        _NBD_CLIENT,
        "            bound_waits(self.sock, seconds, socket.SO_RCVTIMEO)\n",
        "            bound_waits(self.sock, 60, socket.SO_RCVTIMEO)\n",
        _patience("test_a_server_that_never_answers_is_given_up"),
    ),
    Fault(
        "nbd-flush-has-little-time",
        _NBD_CLIENT,
        "            self._have_patience(SLOW_SECONDS)\n",
        "            self._have_patience(REPLY_SECONDS)\n",
        _patience("test_a_server_that_never_answers_is_given_up"),
    ),
    Fault(
        "nbd-server-that-takes-nothing-waited-for",
        _NBD_CLIENT,
        "        bound_waits(self.sock, REPLY_SECONDS, socket.SO_SNDTIMEO)\n",
        "        bound_waits(self.sock, 60, socket.SO_SNDTIMEO)\n",
        _patience("test_a_server_that_takes_nothing_is_given_up"),
    ),
)

_LINES = (
    Fault(
        "name-begins-a-line-of-a-table",
        "incbak/report/backups.py",
        "    rows = [[one_line(cell) for cell in row] for row in rows]\n",
        "",
        unit("report/test_names", "test_in_tables_and_lines"),
    ),
    Fault(
        "name-begins-a-line-of-an-error",
        "incbak/cli/main.py",
        "{' '.join(message.splitlines())}",
        "{message}",
        unit("report/test_names", "test_in_an_error"),
    ),
    Fault(
        "name-begins-a-line-of-a-log",
        "incbak/cli/main.py",
        "        return one_line(super().formatMessage(record))\n",
        "        return super().formatMessage(record)\n",
        unit("report/test_names", "test_in_a_log"),
    ),
    Fault(
        "metrics-kept-by-other-lines",
        "incbak/fleet/metrics.py",
        '    for line in text.split("\\n"):',
        "    for line in text.splitlines():",
        unit("report/test_names", "test_in_a_metrics_file_that_is_written_again"),
    ),
    Fault(
        "name-too-long-for-a-directory",
        "incbak/bitmap/names.py",
        "    if len(quoted) > _LONGEST:",
        "    if False:",
        unit("bitmap/test_names", "test_a_name_is_a_path_component"),
    ),
    Fault(
        "socket-below-open-directories",
        "incbak/nbd/server.py",
        "    durable.make_dir(path.parent)\n",
        "    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)\n",
        unit("test_modes", "test_nobody_else_can_look"),
    ),
    Fault(
        "file-has-the-mode-of-the-umask",
        "incbak/durable.py",
        "            os.fchmod(fd, mode)  # whatever the umask\n",
        "",
        unit("report/test_names", "test_the_metrics_can_be_read_by_everybody"),
    ),
)

FAULTS = (*_QMP, *_PATHS, *_AGENTS, *_NBD, *_LINES)
