"""Many runs of one question: the plan of a sweep, and the queue that works through it."""
