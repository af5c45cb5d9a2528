"""Put arms of a suite side by side over seeds: run what is missing, and say what it shows."""
