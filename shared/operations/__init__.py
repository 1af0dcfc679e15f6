"""Operations: long work that survives any crash. The row is the truth, the message a wake-up.

submit → outbox → claim → run (journal, lease, progress) → finish; reconcile mends the rest.
"""
