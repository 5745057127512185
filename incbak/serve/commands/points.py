"""``x-incbak-point-in-time-add``: a disk as it is now, to be exported and read for as long as it is wanted."""

from __future__ import annotations

from incbak.serve.commands.backup import check_node_name
from incbak.serve.commands.registry import Args, command
from incbak.serve.point_in_time import PointInTime
from incbak.serve.schema import STR, Fields
from incbak.serve.transaction import Action, Transaction
from incbak.serve.vm import Vm

ADD: Fields = {"device": STR, "node-name": STR}


class AddPoint(Action):
    """A point in time of a disk, as a node. In a transaction it is the same instant for all its actions."""

    def __init__(self, vm: Vm, args: Args) -> None:
        self.vm, self.name = vm, str(args["node-name"])
        self.tracked = vm.device(args["device"])
        self.disks = (self.tracked,)

    def prepare(self, transaction: Transaction) -> None:
        """Check; take the name; make the scratch file."""
        check_node_name(self.vm, self.name)
        self.point = PointInTime(self.name, self.tracked, self.vm.budget)
        self.vm.points[self.name] = self.point

    def apply(self) -> None:
        """This is the instant."""
        self.point.begin()

    def undo(self) -> None:
        """It was not."""
        self.point.retreat()

    def discard(self) -> None:
        """Give back what was taken."""
        self.vm.points.pop(self.name, None)
        self.point.discard()


@command("x-incbak-point-in-time-add", ADD)
def add(vm: Vm, args: Args) -> object:
    """Keep a disk as it is now; ``block-export-add`` exports it, ``blockdev-del`` lets it go."""
    Transaction(vm).run([AddPoint(vm, args)])
    return None
