"""`spafl demo`: the whole line as real processes on one machine, and a report of what happened."""
