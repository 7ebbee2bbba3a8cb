"""What training scripts use beside `fl.client`: each algorithm's part that runs where the data is."""
