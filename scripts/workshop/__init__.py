"""The library behind the commands of `scripts/`. Nothing installs it: a command finds it beside itself."""
