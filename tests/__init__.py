"""The contracts. Each test says in its first line what it guards."""
