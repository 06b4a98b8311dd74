"""Knows processes: launch, collectives, heartbeat, watchdog, preemption."""
