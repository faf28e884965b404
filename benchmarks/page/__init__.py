"""How the service's page looks in each of its states, and how quick it is."""
