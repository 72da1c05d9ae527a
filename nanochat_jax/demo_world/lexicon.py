"""The word lists from which the world is made. Plain data, no logic: add a word here and the whole world knows it."""

CHILDREN = (
    ("Mia", "she"), ("Leo", "he"), ("Nora", "she"), ("Finn", "he"), ("Ruby", "she"), ("Oscar", "he"),
    ("Ivy", "she"), ("Toby", "he"), ("Lena", "she"), ("Hugo", "he"), ("Poppy", "she"), ("Sam", "he"),
)  # fmt: skip
ADULTS = (
    ("Anna", "she"), ("Bruno", "he"), ("Clara", "she"), ("David", "he"), ("Edith", "she"), ("Felix", "he"),
    ("Greta", "she"), ("Henry", "he"), ("Kate", "she"), ("Jonas", "he"), ("Olga", "she"), ("Martin", "he"),
    ("Rosa", "she"), ("Peter", "he"), ("Tina", "she"), ("Walter", "he"),
)  # fmt: skip
# job, where the work is done (after "works"), what the work is (after "he" or "she"), the tool
JOBS = (
    ("baker", "in a bakery", "bakes bread and cakes", "an oven"),
    ("teacher", "in a school", "teaches children to read and write", "a blackboard"),
    ("doctor", "in a clinic", "helps people who are ill", "a thermometer"),
    ("carpenter", "in a workshop", "makes tables and chairs", "a saw"),
    ("gardener", "in a garden", "grows flowers", "a spade"),
    ("farmer", "on a farm", "grows wheat and corn", "a plow"),
    ("librarian", "in a library", "lends books to everyone", "a ladder"),
    ("painter", "in a studio", "paints pictures", "a brush"),
    ("tailor", "in a shop", "sews coats and shirts", "a needle"),
    ("clockmaker", "in a workshop", "builds and mends clocks", "a tiny hammer"),
    ("beekeeper", "in an orchard", "looks after bees", "a veil"),
    ("shepherd", "in a meadow", "looks after sheep", "a whistle"),
    ("blacksmith", "in a forge", "shapes hot iron", "a hammer"),
    ("potter", "in a studio", "makes bowls from clay", "a wheel"),
    ("ferry pilot", "on a boat", "takes people across the water", "a compass"),
    ("letter carrier", "in a post office", "brings letters to every door", "a bag"),
)
# town, region, river, hill, what it is known for, what stands in the middle, market day
TOWNS = (
    ("Willowby", "the Green Valley", "Alder", "Lantern Hill", "sweet apples", "a stone bridge", "Monday"),
    ("Stonemere", "the Lake Country", "Pearl", "Owl Hill", "fine clocks", "a clock tower", "Tuesday"),
    ("Larkfield", "the Green Valley", "Wend", "Windmill Hill", "golden honey", "a windmill", "Wednesday"),
    ("Saltwick", "the Long Coast", "Sandy", "Lighthouse Hill", "blue boats", "a lighthouse", "Thursday"),
    ("Pinecross", "the North Woods", "Fern", "Bear Hill", "wooden toys", "a giant pine", "Friday"),
    ("Honeydale", "the Green Valley", "Amber", "Clover Hill", "soft cheese", "a fountain", "Saturday"),
    ("Foxley", "the North Woods", "Rush", "Fox Hill", "warm blankets", "an old well", "Sunday"),
    ("Greywater", "the Long Coast", "Mist", "Gull Hill", "bright kites", "a bell tower", "Saturday"),
)
FOODS = (
    "apple pie", "pancakes", "tomato soup", "honey cake", "cheese", "noodles", "plum jam", "rice pudding", "corn bread",
    "vegetable stew", "peach tart", "potato salad", "lemon cake", "mushroom soup", "berry muffins", "nut bread",
)  # fmt: skip
COLORS = ("red", "blue", "green", "yellow", "orange", "purple", "pink", "white", "brown", "gold")
PET_KINDS = ("cat", "dog", "rabbit", "goat", "duck", "parrot", "turtle", "mouse", "hen", "pony")
PET_NAMES = (
    "Biscuit", "Pepper", "Button", "Clover", "Dusty", "Ginger", "Maple", "Muffin", "Nutmeg", "Olive", "Patch", "Pickle",
    "Pebble", "Rusty", "Shadow", "Snowy", "Socks", "Star", "Sunny", "Tulip", "Waffle", "Whisker", "Velvet", "Bramble",
    "Comet", "Domino", "Feather", "Marble",
)  # fmt: skip
HOBBIES = (
    "flying kites", "reading books", "painting pictures", "playing the flute", "climbing trees", "fishing", "singing",
    "building small boats", "swimming", "telling stories", "watching birds", "growing beans", "playing chess",
    "collecting shells", "baking bread", "riding a bicycle",
)  # fmt: skip

# kind, class, sound (a verb), food, home, number of legs, covering, young, can
ANIMALS = (
    ("cat", "mammal", "meows", "fish", "a house", 4, "fur", "kitten", "climb trees"),
    ("dog", "mammal", "barks", "meat", "a kennel", 4, "fur", "puppy", "follow a smell"),
    ("cow", "mammal", "moos", "grass", "a barn", 4, "hair", "calf", "give milk"),
    ("horse", "mammal", "neighs", "hay", "a stable", 4, "hair", "foal", "pull a cart"),
    ("sheep", "mammal", "bleats", "grass", "a meadow", 4, "wool", "lamb", "give wool"),
    ("pig", "mammal", "oinks", "roots", "a sty", 4, "bristles", "piglet", "dig in the mud"),
    ("goat", "mammal", "bleats", "leaves", "a shed", 4, "hair", "kid", "climb steep rocks"),
    ("rabbit", "mammal", "squeaks", "clover", "a burrow", 4, "fur", "kit", "hop far"),
    ("mouse", "mammal", "squeaks", "seeds", "a hole", 4, "fur", "pup", "run along a wall"),
    ("fox", "mammal", "yelps", "mice", "a den", 4, "fur", "cub", "run without a sound"),
    ("bear", "mammal", "growls", "berries", "a cave", 4, "fur", "cub", "sleep all winter"),
    ("wolf", "mammal", "howls", "meat", "a den", 4, "fur", "pup", "run all night"),
    ("squirrel", "mammal", "chatters", "nuts", "a tree", 4, "fur", "kit", "jump from branch to branch"),
    ("lion", "mammal", "roars", "meat", "the grassland", 4, "fur", "cub", "run very fast"),
    ("elephant", "mammal", "trumpets", "leaves", "the grassland", 4, "skin", "calf", "lift a log"),
    ("whale", "mammal", "sings", "krill", "the sea", 0, "skin", "calf", "dive very deep"),
    ("bat", "mammal", "squeaks", "moths", "a cave", 2, "fur", "pup", "fly in the dark"),
    ("hen", "bird", "clucks", "corn", "a coop", 2, "feathers", "chick", "lay eggs"),
    ("duck", "bird", "quacks", "water plants", "a pond", 2, "feathers", "duckling", "swim and fly"),
    ("owl", "bird", "hoots", "mice", "a hollow tree", 2, "feathers", "owlet", "see in the dark"),
    ("parrot", "bird", "squawks", "fruit", "the jungle", 2, "feathers", "chick", "copy words"),
    ("penguin", "bird", "honks", "fish", "the icy coast", 2, "feathers", "chick", "swim under the ice"),
    ("frog", "amphibian", "croaks", "flies", "a pond", 4, "smooth skin", "tadpole", "jump high"),
    ("snake", "reptile", "hisses", "mice", "a hole", 0, "scales", "snakelet", "move without legs"),
    ("turtle", "reptile", "hisses", "leaves", "a pond", 4, "a hard shell", "hatchling", "live very long"),
    ("bee", "insect", "buzzes", "nectar", "a hive", 6, "fine hair", "larva", "make honey"),
    ("cricket", "insect", "chirps", "leaves", "the grass", 6, "a hard skin", "nymph", "jump very far"),
)

# place, and the words that say where something is that is there
PLACES = (
    ("the mill", "at the mill"), ("the old bridge", "under the old bridge"), ("the market", "at the market"),
    ("the library", "in the library"), ("the orchard", "in the orchard"), ("the meadow", "in the meadow"),
    ("the pond", "by the pond"), ("the station", "at the station"), ("the park", "in the park"),
    ("the barn", "in the barn"), ("the garden", "in the garden"), ("the well", "by the well"),
    ("the toy shop", "in the toy shop"), ("the river bank", "on the river bank"), ("the forest", "in the forest"),
    ("the school", "at the school"), ("the playground", "on the playground"), ("the bakery", "in the bakery"),
)  # fmt: skip
# small things that one child can carry, lose and find
THINGS = (
    "kite", "drum", "basket", "lantern", "ball", "hat", "key", "book", "bell", "scarf", "cup", "map", "flute", "bag",
    "whistle", "umbrella", "mitten", "spoon", "ribbon", "blanket", "puppet", "toy boat", "music box", "paintbrush",
)  # fmt: skip
HIDING = (
    "under the bed", "behind the door", "in a basket of apples", "on top of the cupboard", "under a pile of leaves",
    "inside an old boot", "behind the stove", "in the wheelbarrow", "between two cushions", "under the stairs",
    "in the branches of a pear tree", "in the hay",
)  # fmt: skip
FRUITS = ("apples", "pears", "plums", "cherries", "peaches", "berries")
VEGETABLES = ("carrots", "beans", "pumpkins", "tomatoes", "peas", "onions", "potatoes", "radishes")
FLOWERS = ("roses", "tulips", "daisies", "sunflowers", "lilies", "poppies")
# singular, plural: things to count and to share out
COUNTABLE = (
    ("apple", "apples"), ("pear", "pears"), ("plum", "plums"), ("egg", "eggs"), ("nut", "nuts"), ("shell", "shells"),
    ("button", "buttons"), ("coin", "coins"), ("marble", "marbles"), ("book", "books"), ("card", "cards"),
    ("flower", "flowers"), ("stone", "stones"), ("pencil", "pencils"), ("cookie", "cookies"), ("cherry", "cherries"),
    ("stamp", "stamps"), ("bean", "beans"), ("candle", "candles"), ("feather", "feathers"),
    ("bead", "beads"), ("carrot", "carrots"), ("box", "boxes"), ("berry", "berries"),
)  # fmt: skip
FEELINGS = ("happy", "proud", "glad", "calm", "thankful", "cheerful")
# more everyday words that are spelled and whose letters are counted
SPELLING_EXTRA = (
    "able about across afraid again air almost alone always angry answer arm arrow asleep autumn bakery banana barrel "
    "bath beach beard because become before begin behind belong bench better between beyond bicycle bird blossom body "
    "bottle bottom branch brave bread breakfast breeze brick bridge bright brother bubble bucket build bundle butter "
    "cabin candle canvas captain careful carpet castle ceiling chair cheese chimney circle city clever climb clock "
    "cloud coast collar color cottage cotton country cousin crayon cream creek crowd crown curious curtain dance "
    "daughter dawn dinner distance dollar dragon drawer dream dress drum eager earth echo eight elbow empty engine "
    "enough evening every family famous farm father fence festival field finger fire first floor flower flour follow "
    "forest forget fork fresh friend frost garden gather gentle giant glass glove goodbye grandmother grass green "
    "guest half hammer handle happy harbor harvest hat heart heavy helmet history holiday honest honey hour house "
    "hundred hungry island jacket jelly journey judge jump kettle kind king kitchen kneel knife ladder lake lamp "
    "laugh lazy leather lemon lesson letter library light listen little lucky lunch magic market marry meadow measure "
    "melon middle midnight mirror moment money month morning mother mountain mouth mud music narrow nature neighbor "
    "never night noise north nothing number ocean onion open orange orchard oven owner page palace paper parade "
    "parcel parent patient peace pebble pencil people piano picnic picture pillow pirate planet plant plate pocket "
    "poem point polite potato present pretty promise puzzle queen question quick quiet rabbit rainbow reason remember "
    "ribbon river road robin rocket roof room round sail salt sand sandwich school scissors season secret shadow "
    "share shell shelter shirt shoe shoulder silent silver simple sister sleepy slipper smile smoke smooth snow soft "
    "soldier sound spoon spring square stable station stone storm story stranger strawberry street string strong "
    "student sugar summer sunset supper surprise sweater table teapot thank thirsty thousand thread thunder ticket "
    "tiger tired today together tomato tomorrow tooth tower trouble trumpet tunnel twelve twenty umbrella uncle "
    "valley village violin visit voice wagon walnut water weather week welcome whisper wheel window winter wisdom "
    "wonder wood world yellow yesterday young zebra "
).split()
