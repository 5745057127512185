"""``job-*``, ``block-job-*`` and the queries on jobs."""

from __future__ import annotations

from incbak.serve.commands.registry import Args, command
from incbak.serve.schema import BOOL, INT, STR, Fields, Opt, QmpError
from incbak.serve.vm import Vm

_ID: Fields = {"id": STR}
_DEVICE: Fields = {"device": STR}


@command("query-jobs")
def query_jobs(vm: Vm, args: Args) -> object:
    """Every job."""
    return [job.job_info() for job in vm.jobs.all()]


@command("query-block-jobs")
def query_block_jobs(vm: Vm, args: Args) -> object:
    """Every job, as block jobs are told; all of ours are."""
    return [job.block_job_info() for job in vm.jobs.all()]


@command("job-cancel", _ID)
def job_cancel(vm: Vm, args: Args) -> object:
    """Stop a job."""
    vm.job(args["id"]).cancel()
    return None


@command("job-pause", _ID)
def job_pause(vm: Vm, args: Args) -> object:
    """Let a job rest."""
    vm.job(args["id"]).pause()
    return None


@command("job-resume", _ID)
def job_resume(vm: Vm, args: Args) -> object:
    """Let a job that rests go on."""
    vm.job(args["id"]).resume()
    return None


@command("job-complete", _ID)
def job_complete(vm: Vm, args: Args) -> object:
    """Refused by every job of ours, with QEMU's words."""
    vm.job(args["id"]).complete()
    return None


@command("job-finalize", _ID)
def job_finalize(vm: Vm, args: Args) -> object:
    """Let a pending job conclude."""
    vm.job(args["id"]).finalize()
    return None


@command("job-dismiss", _ID)
def job_dismiss(vm: Vm, args: Args) -> object:
    """Forget a concluded job."""
    vm.job(args["id"]).dismiss()
    return None


@command("block-job-cancel", {**_DEVICE, "force": Opt(BOOL)})
def block_job_cancel(vm: Vm, args: Args) -> object:
    """Stop a job; one that is paused only with ``force``."""
    job = vm.block_job(args["device"])
    if job.paused and not args.get("force", False):
        raise QmpError(f"The block job for device '{job.id}' is currently paused")
    job.cancel()
    return None


@command("block-job-pause", _DEVICE)
def block_job_pause(vm: Vm, args: Args) -> object:
    """Let a job rest."""
    vm.block_job(args["device"]).pause()
    return None


@command("block-job-resume", _DEVICE)
def block_job_resume(vm: Vm, args: Args) -> object:
    """Let a job that rests go on."""
    vm.block_job(args["device"]).resume()
    return None


@command("block-job-complete", _DEVICE)
def block_job_complete(vm: Vm, args: Args) -> object:
    """Refused by every job of ours, with QEMU's words."""
    vm.block_job(args["device"]).complete()
    return None


@command("block-job-finalize", _ID)
def block_job_finalize(vm: Vm, args: Args) -> object:
    """Let a pending job conclude."""
    vm.block_job(args["id"]).finalize()
    return None


@command("block-job-dismiss", _ID)
def block_job_dismiss(vm: Vm, args: Args) -> object:
    """Forget a concluded job."""
    vm.block_job(args["id"]).dismiss()
    return None


@command("block-job-set-speed", {**_DEVICE, "speed": INT})
def block_job_set_speed(vm: Vm, args: Args) -> object:
    """Bytes per second from now on; 0 for no limit."""
    job = vm.block_job(args["device"])
    job.require("set-speed")
    if args["speed"] < 0:
        raise QmpError("Parameter 'speed' expects a non-negative value")
    job.set_speed(args["speed"])
    return None
