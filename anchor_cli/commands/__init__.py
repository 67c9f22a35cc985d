"""Floor 7: one thin function a command."""
