"""The Celery app as Flower needs it: the same broker and key prefix as everybody's."""

from shared.celery_app import make_app

app = make_app("flower", [], [])
