"""``incbak serve`` as an engine: one transaction over all disks, pushed to the sinks over their private socket."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from incbak.engine.base import (
    BitmapInfo,
    Description,
    DiskPlan,
    Engine,
    EngineDisk,
    ProgressCallback,
    RunResult,
    Target,
    run_of,
    superseded,
)
from incbak.engine.jobs import cancel_jobs, refuse_beside_backup, wait_for_jobs
from incbak.engine.session import CommandFailed, Session
from incbak.errors import EngineError
from incbak.reasons import Reason


class ServedEngine(Engine):
    """See `Engine`. Owns the session."""

    kind = "serve"

    def __init__(self, session: Session, speed: int = 0) -> None:
        self._session, self._speed = session, speed

    async def describe(self) -> Description:
        name = (await self._session.execute("query-name")).get("name")
        version = await self._session.execute("query-version")
        disks = tuple(_disk(entry) for entry in await self._session.execute("query-block") if "inserted" in entry)
        images = {d.name: d.extra["image"] for d in disks}
        return Description(name, disks, str(version.get("package", "")), {"images": images, "name": name})

    async def cleanup(self, prefix: str, keep: Collection[str]) -> list[str]:
        done = await cancel_jobs(self._session, prefix)
        for node in await self._session.execute("query-named-block-nodes"):
            if node["node-name"].startswith(prefix):
                await self._session.execute("blockdev-del", {"node-name": node["node-name"]})
                done.append(f"node {node['node-name']}")
                continue
            for bitmap in node.get("dirty-bitmaps", []):
                name = bitmap.get("name", "")
                if name.startswith(prefix) and run_of(name) not in keep:
                    await self._remove(node["node-name"], name)
                    done.append(f"bitmap {name} of {node['node-name']}")
        return done

    async def run(
        self, plans: Sequence[DiskPlan], targets: Mapping[str, Target], progress: ProgressCallback
    ) -> RunResult:
        actions: list[dict[str, Any]] = []
        jobs: dict[str, str] = {}
        for number, plan in enumerate(plans):
            ident = f"{plan.run}-{number}"
            await self._add_target(f"{ident}-t", targets[plan.disk.name])
            add = {"node": plan.disk.node, "name": plan.new_bitmap, "granularity": plan.granularity, "persistent": True}
            actions.append({"type": "block-dirty-bitmap-add", "data": add})
            actions.append({"type": "blockdev-backup", "data": _backup(plan, ident, self._speed)})
            jobs[ident] = plan.disk.name
        await self._session.execute("transaction", {"actions": actions})
        results = await wait_for_jobs(self._session, jobs, progress, speed=self._speed)
        for ident in jobs:
            await self._session.execute("blockdev-del", {"node-name": f"{ident}-t"})
        return RunResult(results)

    async def _add_target(self, node: str, target: Target) -> None:
        path, export = target.address()
        server = {"type": "unix", "path": str(path)}
        add = {"driver": "nbd", "node-name": node, "server": server, "export": export}
        await self._session.execute("blockdev-add", add)

    async def commit(self, plans: Sequence[DiskPlan]) -> None:
        for plan in plans:
            for name in superseded(plan):
                await self._remove(plan.disk.node, name)

    async def rollback(self, plans: Sequence[DiskPlan]) -> None:
        for plan in plans:
            await self.cleanup(plan.run, ())

    async def remove_bitmaps(self, bitmaps: Sequence[tuple[EngineDisk, str]]) -> None:
        await refuse_beside_backup(self._session)
        for disk, name in bitmaps:
            await self._remove(disk.node, name)

    async def invalidate(self, disk: EngineDisk, name: str, reason: Reason) -> None:
        arguments = {"node": disk.node, "name": name, "reason": str(reason)}
        try:
            await self._session.execute("x-incbak-bitmap-invalidate", arguments)
        except CommandFailed as e:
            if e.error_class != "CommandNotFound":
                raise
            await self._remove(disk.node, name)

    async def _remove(self, node: str, name: str) -> None:
        try:
            await self._session.execute("block-dirty-bitmap-remove", {"node": node, "name": name})
        except CommandFailed as e:
            if "not found" not in str(e):
                raise EngineError(f"cannot remove bitmap {name} of {node}: {e}") from e

    async def close(self) -> None:
        await self._session.close()


def _backup(plan: DiskPlan, ident: str, speed: int) -> dict[str, Any]:
    data: dict[str, Any] = {
        "device": plan.disk.node,
        "target": f"{ident}-t",
        "job-id": ident,
        "sync": "full",
        "speed": speed,
        "auto-dismiss": False,
        "on-cbw-error": "break-snapshot",
    }
    if plan.base_bitmap:
        data |= {"sync": "bitmap", "bitmap": plan.base_bitmap, "bitmap-mode": "never"}
    return data


def _disk(entry: Mapping[str, Any]) -> EngineDisk:
    inserted = entry["inserted"]
    bitmaps = tuple(bitmap_info(b) for b in inserted.get("dirty-bitmaps", []))
    size = int(inserted["image"]["virtual-size"])
    return EngineDisk(
        name=entry["device"],
        size=size,
        node=inserted["node-name"],
        device=entry["device"],
        can_persist=True,
        bitmaps=bitmaps,
        extra={"image": inserted.get("file", ""), "path": inserted.get("x-incbak-path", "")},
    )


def bitmap_info(raw: Mapping[str, Any]) -> BitmapInfo:
    """A bitmap from QMP's ``BlockDirtyInfo``."""
    reason = raw.get("x-incbak-reason")
    return BitmapInfo(
        name=raw.get("name", ""),
        granularity=int(raw["granularity"]),
        count=int(raw["count"]),
        recording=bool(raw["recording"]),
        busy=bool(raw["busy"]),
        persistent=bool(raw["persistent"]),
        inconsistent=bool(raw.get("inconsistent", False)),
        reason=Reason(reason) if reason in set(Reason) else None,
        found=str(raw.get("x-incbak-found", "")),
        path=str(raw.get("x-incbak-path", "")),
    )
