"""What a person does: the command line, reading specs, planning, running, submitting."""
