"""Floor 4: one thin function a command."""
