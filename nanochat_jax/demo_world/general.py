"""Simple facts of the real world that the little world shares: capitals, symbols, opposites, days, planets, ..."""

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
SEASONS = ("spring", "summer", "autumn", "winter")
PLANETS = ("Mercury", "Venus", "Earth", "Mars", "Jupiter", "Saturn", "Uranus", "Neptune")
RAINBOW = ("red", "orange", "yellow", "green", "blue", "indigo", "violet")
ORDINALS = (
    "first",
    "second",
    "third",
    "fourth",
    "fifth",
    "sixth",
    "seventh",
    "eighth",
    "ninth",
    "tenth",
    "eleventh",
    "twelfth",
)

CAPITALS = (
    ("France", "Paris"), ("Italy", "Rome"), ("Spain", "Madrid"), ("Germany", "Berlin"), ("Japan", "Tokyo"),
    ("Egypt", "Cairo"), ("Norway", "Oslo"), ("Greece", "Athens"), ("Canada", "Ottawa"), ("Poland", "Warsaw"),
    ("Ireland", "Dublin"), ("Austria", "Vienna"), ("Portugal", "Lisbon"), ("Kenya", "Nairobi"), ("Peru", "Lima"),
    ("England", "London"),
)  # fmt: skip
CONTINENTS = (
    ("France", "Europe"), ("Italy", "Europe"), ("Spain", "Europe"), ("Germany", "Europe"), ("Japan", "Asia"),
    ("Egypt", "Africa"), ("Norway", "Europe"), ("Greece", "Europe"), ("Canada", "North America"),
    ("Poland", "Europe"), ("Ireland", "Europe"), ("Austria", "Europe"), ("Portugal", "Europe"), ("Kenya", "Africa"),
    ("Peru", "South America"), ("England", "Europe"),
)  # fmt: skip
SYMBOLS = (
    ("gold", "Au"), ("silver", "Ag"), ("iron", "Fe"), ("copper", "Cu"), ("oxygen", "O"), ("hydrogen", "H"),
    ("carbon", "C"), ("tin", "Sn"), ("lead", "Pb"), ("helium", "He"),
)  # fmt: skip
OPPOSITES = (
    ("hot", "cold"), ("big", "small"), ("fast", "slow"), ("day", "night"), ("up", "down"), ("open", "closed"),
    ("happy", "sad"), ("light", "dark"), ("wet", "dry"), ("old", "new"), ("long", "short"), ("full", "empty"),
    ("hard", "soft"), ("early", "late"), ("loud", "quiet"), ("near", "far"), ("left", "right"), ("in", "out"),
    ("rich", "poor"), ("strong", "weak"), ("clean", "dirty"), ("high", "low"), ("thick", "thin"), ("true", "false"),
    ("first", "last"), ("always", "never"), ("sweet", "sour"), ("brave", "afraid"),
)  # fmt: skip
# a thing (with what stands before it in a sentence) and its color
COLORS_OF = (
    ("the sky", "blue"), ("grass", "green"), ("snow", "white"), ("a lemon", "yellow"), ("a carrot", "orange"),
    ("coal", "black"), ("a ripe tomato", "red"), ("the sun", "yellow"), ("chocolate", "brown"), ("milk", "white"),
    ("a frog", "green"), ("a flamingo", "pink"), ("a plum", "purple"), ("the sea", "blue"), ("a crow", "black"),
)  # fmt: skip
SIDES = (("triangle", 3), ("square", 4), ("rectangle", 4), ("pentagon", 5), ("hexagon", 6), ("octagon", 8))
UNITS = (
    ("minute", "sixty seconds"), ("hour", "sixty minutes"), ("day", "twenty-four hours"), ("week", "seven days"),
    ("year", "twelve months"), ("century", "one hundred years"),
)  # fmt: skip
USES = (
    ("hammer", "driving nails"), ("saw", "cutting wood"), ("needle", "sewing cloth"), ("kettle", "boiling water"),
    ("umbrella", "staying dry"), ("broom", "sweeping the floor"), ("key", "opening a door"),
    ("clock", "telling the time"),
    ("lantern", "giving light"), ("spade", "digging the ground"), ("ladder", "climbing up high"),
    ("cup", "drinking tea"),
    ("pen", "writing letters"), ("map", "finding the way"), ("oven", "baking bread"), ("boat", "crossing the water"),
    ("compass", "finding north"), ("basket", "carrying fruit"),
)  # fmt: skip
PLURALS = (
    ("child", "children"), ("mouse", "mice"), ("foot", "feet"), ("tooth", "teeth"), ("goose", "geese"),
    ("leaf", "leaves"), ("man", "men"), ("woman", "women"), ("knife", "knives"), ("box", "boxes"), ("city", "cities"),
    ("sheep", "sheep"), ("cat", "cats"), ("berry", "berries"), ("wolf", "wolves"), ("book", "books"),
)  # fmt: skip
SENSES = (("eyes", "see"), ("ears", "hear"), ("nose", "smell"), ("tongue", "taste"), ("hands", "feel"))
ORIGINS = (
    ("honey", "bees"), ("milk", "cows"), ("wool", "sheep"), ("eggs", "hens"), ("bread", "flour"), ("cheese", "milk"),
    ("paper", "wood"), ("glass", "sand"), ("flour", "wheat"), ("butter", "cream"), ("raisins", "grapes"),
)  # fmt: skip
SEASON_OF = (
    ("December", "winter"), ("January", "winter"), ("February", "winter"), ("March", "spring"), ("April", "spring"),
    ("May", "spring"), ("June", "summer"), ("July", "summer"), ("August", "summer"), ("September", "autumn"),
    ("October", "autumn"), ("November", "autumn"),
)  # fmt: skip
MONTH_DAYS = tuple(
    (month, 28 if month == "February" else 30 if month in ("April", "June", "September", "November") else 31)
    for month in MONTHS
)
