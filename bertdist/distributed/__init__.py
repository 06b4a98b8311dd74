"""Knows processes: launch, collectives, rendezvous, heartbeat, watchdog, preemption."""
