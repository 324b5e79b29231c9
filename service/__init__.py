"""The serving application. Never imports torch or `training`."""
