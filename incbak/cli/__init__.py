"""The commands: arguments in, one call into the packages below, lines or JSON out, an exit code.

`main` is the group and the one place where an error becomes a message; `settings` has the options that commands share
and the rules for names, sizes and times. A command's module is imported when the command runs, so that a start is
quick. Nothing below this package prints.
"""
