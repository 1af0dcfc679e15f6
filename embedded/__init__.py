"""The embedded stack: Redis, API, the three workers and beat as plain processes of one machine.

`make up` and `make down` use it, and so do the demo, the tests and the bench.
"""
