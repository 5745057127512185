"""Many VMs by name: the configuration, and what runs around their backups.

``config``: the file, read strictly: an unknown key, a wrong type or a path that is not absolute is an error that names
file, key and what is expected, before anything is done. ``hooks``: commands of the user's before and after a backup.
``metrics``: a text file for Prometheus. ``schedule``: cron lines and systemd units that fit the configuration.

A VM's table in the file holds the options of the commands, by their long names. So what a command does for ``web1`` is
what it does with the same options on its command line, and an option that is given there wins.
"""
