"""Processes of a run: launch and rendezvous, collectives, heartbeat, watchdog, preemption."""
