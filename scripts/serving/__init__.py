"""A service from outside: started, asked, and besieged."""
