-- Half the text: with 500,000 tokens a laptop of two cores took ten minutes, not five.
UPDATE templates
SET config = json_set(config, '$.hyperparameters.tokens', 250000)
WHERE kind = 'training' AND name = '5-minute classroom' AND created_at = updated_at;
