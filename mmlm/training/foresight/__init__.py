"""What a training will take, said before it starts: memory, FLOPs, time, money.

    rehearsal   a step on tensors without contents: what it allocates
    flops       the useful FLOPs of samples, for forecasts and for MFU
    machines    what datasheets promise, and what this machine does
    estimate    the four put together for a named machine

Nothing here trains, and nothing but `machines.measured_rate` measures.
"""
