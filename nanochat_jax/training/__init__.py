"""The one training loop: step, optimizer, schedules, ZeRO layout, anomalies, shutdown."""
