"""Ranks, the DeepSpeed engine, ZeRO state whole and by name, EMA, the watchdog."""
