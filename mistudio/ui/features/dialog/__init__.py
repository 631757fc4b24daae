"""The dialog of one feature; `FeatureDialog` in `dialog`, one module for each tab."""
