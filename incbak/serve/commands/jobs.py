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
    """Stop a job; forced or not is the same for a backup."""
    vm.block_job(args["device"]).cancel()
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
    if args["speed"] < 0:
        raise QmpError("Parameter 'speed' expects a non-negative value")
    job.require("set-speed")
    job.set_speed(args["speed"])
    return None
