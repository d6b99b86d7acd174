"""QKAN: functions made by a simulated qubit that reads its input several times, on the edges of a KAN."""
