"""What the services share: operations, the copy engine, the vault, the database."""

VERSION = "0.1.0"
