"""Between a TRL trainer and the chunk engine: settings, callbacks, checkpoints, report."""
