"""The losslessness kit, for our tests and for third parties' own."""
